// The page's pictures in docs/serve.md, of `make serve-demo`: node docs/pictures.cjs CHROMIUM ADDRESS PICTURE OUT
const { chromium } = require("playwright-core");
const [executablePath, address, picture, out] = process.argv.slice(2);

async function main() {
  const browser = await chromium.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"] });
  for (const [kind, width, height] of [["desktop", 1200, 860], ["phone", 390, 844]]) {
    for (const colorScheme of ["light", "dark"]) {
      const page = await browser.newPage({ viewport: { width, height }, colorScheme });
      page.setDefaultTimeout(120_000);
      await page.goto(address);
      await page.setInputFiles("#file", picture);
      await page.click("#search");
      await page.waitForSelector("#matches img[src]");
      await page.evaluate(() => {
        const scores = [...document.querySelectorAll("#matches .score")].map(at => Number(at.textContent));
        document.getElementById("threshold").value = (scores[2] + scores[3]) / 2;
        document.getElementById("threshold").dispatchEvent(new Event("input"));
        scrollTo(0, 0);
      });
      await page.waitForLoadState("networkidle");
      await page.screenshot({ path: `${out}/page-${kind}-${colorScheme}.png`, fullPage: false });
      await page.close();
    }
  }
  await browser.close();
}

main().catch(error => { console.error(error.message); process.exit(1); });
