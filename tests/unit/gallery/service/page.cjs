// The page in a real browser, by keyboard: node page.cjs CHROMIUM ADDRESS PICTURE
const { chromium } = require("playwright-core");
const assert = require("node:assert");
const [executablePath, address, picture] = process.argv.slice(2);

async function tabTo(page, id) {
  for (let i = 0; i < 60; i++) {
    if (await page.evaluate(id => document.activeElement.id === id, id)) return;
    await page.keyboard.press("Tab");
  }
  assert.fail(`Tab does not reach ${id}`);
}

// What WCAG 2.2 AA asks of colors and sizes: text 4.5 to 1, the edge of a field 3 to 1, 24 pixels to press.
function hardToUse() {
  const light = color => color.match(/[\d.]+/g).slice(0, 3).map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4).reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + 0.05) / (Math.min(light(a), light(b)) + 0.05);
  const clear = color => /, 0\)$|transparent/.test(color);
  const behind = at => { while (at.parentElement && clear(getComputedStyle(at).backgroundColor)) at = at.parentElement;
    return getComputedStyle(at).backgroundColor; };
  const wrong = [];
  for (const at of document.querySelectorAll("body, body *:not(script)")) {
    const style = getComputedStyle(at), told = at.id || at.className || at.tagName, box = at.getBoundingClientRect();
    if (!box.width || at.disabled) continue;
    const words = [...at.childNodes].some(node => node.nodeType === 3 && node.textContent.trim());
    if (words && ratio(style.color, behind(at)) < 4.5) wrong.push(`${told}: text ${ratio(style.color, behind(at)).toFixed(2)}`);
    if (!/^(BUTTON|INPUT)$/.test(at.tagName)) continue;
    if (box.height < 24) wrong.push(`${told}: ${box.height} pixels high`);
    if (parseFloat(style.borderTopWidth) && ratio(style.borderTopColor, behind(at.parentElement)) < 3)
      wrong.push(`${told}: edge ${ratio(style.borderTopColor, behind(at.parentElement)).toFixed(2)}`);
  }
  return wrong;
}

async function main() {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  for (const colorScheme of ["light", "dark"]) for (const [width, height] of [[1200, 900], [390, 844]]) {
    const page = await browser.newPage({ viewport: { width, height }, colorScheme });
    const wrong = [], elsewhere = [];
    page.on("pageerror", error => wrong.push(error.message));
    page.on("console", message => message.type() === "error" && wrong.push(message.text()));
    page.on("request", request => /^(blob|data):/.test(request.url()) || request.url().startsWith(address) || elsewhere.push(request.url()));
    page.on("dialog", dialog => dialog.accept());
    const reads = (id, text) => page.waitForFunction(([id, text]) => document.getElementById(id).textContent.includes(text), [id, text]);
    await page.goto(address);
    await reads("empty", "Nobody is enrolled yet.");
    await page.setInputFiles("#file", { name: "notes.txt", mimeType: "text/plain", buffer: Buffer.from("notes") });
    await reads("said", "That is no picture.");
    await page.setInputFiles("#file", picture);
    await page.waitForFunction(() => document.activeElement.id === "id");
    await page.keyboard.type("<b>ann</b>");
    await page.keyboard.press("Enter");
    await reads("said", "Enrolled <b>ann</b>: 1 image now.");
    await page.focus("#drop");
    await tabTo(page, "search");
    await page.keyboard.press("Enter");
    await reads("sum", "The best 1 of 1 image");
    assert.equal(await page.textContent("#matches .name"), "<b>ann</b>");
    await tabTo(page, "threshold");
    await page.keyboard.press("End");
    await reads("cosine", "1.00");
    await page.keyboard.press("Home");
    await reads("sum", "1 above the threshold");
    assert.deepEqual(await page.evaluate(hardToUse), []);
    await page.fill("#camera", "7");
    await page.press("#camera", "Enter");
    await reads("empty", "No image passes the filter.");
    await page.click("#clear");
    await reads("sum", "The best 1 of 1 image");
    await page.fill("#id", "");
    await page.click("#matches .name");
    assert.equal(await page.inputValue("#id"), "<b>ann</b>");
    assert.deepEqual([wrong, elsewhere], [[], []]);
    await page.context().setOffline(true);
    await page.click("#search");
    await reads("said", "The service does not answer.");
    await page.context().setOffline(false);
    await page.click("#forget");
    await reads("said", "Forgot <b>ann</b>: 1 image removed.");
    await reads("empty", "Nobody is enrolled yet.");
    assert.ok(await page.evaluate(() => document.documentElement.scrollWidth) <= width, "the page is wider than the screen");
    await page.close();
  }
  await browser.close();
}

main().catch(error => { console.error(error.message); process.exit(1); });
