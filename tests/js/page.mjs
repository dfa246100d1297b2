// node page.mjs CHROMIUM URL PICTURE QUESTION WIDTH HEIGHT SHOT.PNG: asks index.html and prints what it shows as JSON.
import puppeteer from "puppeteer-core";

const [executablePath, url, picture, question, width, height, shot] = process.argv.slice(2);
const browser = await puppeteer.launch({ executablePath, args: ["--no-sandbox", "--disable-gpu"], headless: true });
try {
  const page = await browser.newPage();
  const problems = [];
  const foreign = [];
  page.on("pageerror", (error) => problems.push(error.message));
  page.on("console", (message) => {
    if (message.type() === "error") problems.push(message.text());
  });
  page.on("request", (request) => {
    if (!/^(blob|data):/.test(request.url()) && !request.url().startsWith(url)) foreign.push(request.url());
  });
  const narrow = Number(width) < 600;
  await page.setViewport({
    width: Number(width),
    height: Number(height),
    deviceScaleFactor: narrow ? 2 : 1,
    isMobile: narrow,
  });
  await page.goto(url);
  await page.waitForFunction(() => !document.getElementById("ask").disabled || document.querySelector(".failed"), {
    timeout: 120000,
  });
  const loaded = await page.$eval("#ask", (button) => !button.disabled);
  await (await page.$("#file")).uploadFile(picture);
  await page.$eval(
    "#question",
    (field, text) => {
      field.value = text;
    },
    question,
  );
  if (loaded) await page.click("#ask");
  await page.waitForFunction(
    () => /tokens in/.test(document.getElementById("numbers").textContent) || document.querySelector(".failed"),
    { timeout: 120000 },
  );
  await page.screenshot({ path: shot, fullPage: true });
  const seen = await page.evaluate(() => {
    const canvas = document.getElementById("canvas");
    const text = (id) => document.getElementById(id).textContent;
    const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return {
      answer: text("answer"),
      legend: text("legend"),
      status: text("status"),
      layers: text("layers"),
      failed: !!document.querySelector(".failed"),
      overflows: document.documentElement.scrollWidth > innerWidth,
      size: [canvas.width, canvas.height],
      pixels: btoa(Array.from(data, (value) => String.fromCharCode(value)).join("")),
    };
  });
  console.log(JSON.stringify({ ...seen, problems, foreign }));
} finally {
  await browser.close();
}
