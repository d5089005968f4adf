// The page in a real browser, by keyboard: node page.cjs CHROMIUM ADDRESS PICTURE
const { chromium } = require("playwright-core");
const assert = require("node:assert");
const [executablePath, address, picture] = process.argv.slice(2);

async function tabTo(page, id) {
  for (let i = 0; i < 40; i++) {
    if (await page.evaluate(id => document.activeElement.id === id, id)) return;
    await page.keyboard.press("Tab");
  }
  assert.fail(`Tab does not reach ${id}`);
}

async function main() {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  for (const [width, height, colorScheme] of [[1200, 900, "light"], [390, 844, "dark"]]) {
    const page = await browser.newPage({ viewport: { width, height }, colorScheme });
    const wrong = [], elsewhere = [];
    page.on("pageerror", error => wrong.push(error.message));
    page.on("console", message => message.type() === "error" && wrong.push(message.text()));
    page.on("request", request => /^(blob|data):/.test(request.url()) || request.url().startsWith(address) || elsewhere.push(request.url()));
    page.on("dialog", dialog => dialog.accept());
    const said = text => page.waitForFunction(text => document.getElementById("said").textContent.includes(text), text);
    await page.goto(address);
    await page.setInputFiles("#file", picture);
    await tabTo(page, "id");
    await page.keyboard.type("<b>ann</b>");
    await tabTo(page, "enroll");
    await page.keyboard.press("Enter");
    await said("Enrolled <b>ann</b>: 1 images now.");
    await page.focus("#drop");
    await tabTo(page, "search");
    await page.keyboard.press("Enter");
    await said("Best 1 of 1 images.");
    assert.equal(await page.textContent("#matches .name"), "<b>ann</b>");
    await tabTo(page, "threshold");
    await page.keyboard.press("End");
    assert.match(await page.textContent("#matches"), /threshold 1.00|1.000/);
    await page.fill("#camera", "7");
    await page.click("#search");
    await said("No image passes the filter.");
    await page.click("#forget");
    await said("Forgot <b>ann</b>: 1 images removed.");
    assert.ok(await page.evaluate(() => document.documentElement.scrollWidth) <= width, "the page is wider than the screen");
    assert.deepEqual([wrong, elsewhere], [[], []]);
    await page.close();
  }
  await browser.close();
}

main().catch(error => { console.error(error.message); process.exit(1); });
