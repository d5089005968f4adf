import { embed, open, openGallery, rank } from "./reid.js";

const MANIFEST_SHA256 = "@MANIFEST_SHA256@";  // no other model is opened
const SHOWN = 10;
const element = id => document.getElementById(id);
const say = text => (element("said").textContent = text);

async function start() {
  const model = await open("model", MANIFEST_SHA256);
  const gallery = await openGallery("gallery.json", model);
  element("file").disabled = false;
  say(`${gallery.names.length} pictures in the gallery.`);
  return { model, gallery };
}

async function ask(picture) {
  const { model, gallery } = await ready;
  element("shown").src = URL.createObjectURL(picture);
  element("query").hidden = false;
  say("Computing ...");
  const before = performance.now();
  const found = rank(await embed(model, picture), gallery).slice(0, SHOWN);
  say(`Best ${found.length} of ${gallery.names.length}, in ${Math.round(performance.now() - before)} ms.`);
  element("found").replaceChildren(...found.map(({ index, score }) => item(gallery, index, score)));
}

function item(gallery, index, score) {
  const names = ["li", "figure", "img", "figcaption", "b"];
  const [entry, figure, image, caption, name] = names.map(each => document.createElement(each));
  image.src = gallery.pictures[index];
  image.alt = "";
  name.textContent = gallery.names[index];
  caption.append(name, ` ${score.toFixed(4)}`);
  figure.append(image, caption);
  entry.append(figure);
  return entry;
}

const told = error => say(`Error: ${error.message}`);
const ready = start();
ready.catch(told);
const take = files => files.length && ask(files[0]).catch(told);
element("file").addEventListener("change", event => take(event.target.files));
for (const [name, over] of [["dragover", true], ["dragleave", false], ["drop", false]])
  element("drop").addEventListener(name, event => {
    event.preventDefault();
    element("drop").classList.toggle("over", over);
    if (name === "drop") take(event.dataTransfer.files);
  });
