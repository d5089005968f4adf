// The web kit in a real browser: node kit_page.cjs CHROMIUM ADDRESS SCREENSHOT PICTURE ...   prints features and matches as JSON
const { chromium } = require("playwright-core");
const [executablePath, address, screenshot, ...pictures] = process.argv.slice(2);

async function main() {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  const page = await browser.newPage({ viewport: { width: 820, height: 400 } });
  page.setDefaultTimeout(240000);
  const wrong = [], elsewhere = [];
  page.on("pageerror", error => wrong.push(error.message));
  page.on("console", message => message.type() === "error" && wrong.push(message.text()));
  page.on("request", request => /^(blob|data):/.test(request.url()) || request.url().startsWith(address) || elsewhere.push(request.url()));
  await page.goto(address);
  await page.waitForFunction(() => /in the gallery|Error/.test(document.getElementById("said").textContent));
  const said = [await page.textContent("#said")], matches = [], features = [];
  if (!said[0].startsWith("Error"))
    for (const picture of pictures) {
      await page.evaluate(() => (document.getElementById("said").textContent = ""));
      await page.setInputFiles("#file", picture);
      await page.waitForFunction(() => /Best|Error/.test(document.getElementById("said").textContent));
      said.push(await page.textContent("#said"));
      matches.push(await page.locator("#found figcaption").allTextContents());
      features.push(await page.evaluate(async () => {
        const reid = await import("./reid.js");
        const sha256 = (await (await fetch("gallery.json")).json()).manifest_sha256;
        const model = await reid.open("model", sha256);
        return Array.from(await reid.embed(model, document.getElementById("file").files[0]));
      }));
    }
  await page.screenshot({ path: screenshot, fullPage: true });
  await browser.close();
  console.log(JSON.stringify({ said, matches, features, wrong, elsewhere }));
}
main().catch(error => { console.error(error); process.exit(1); });
