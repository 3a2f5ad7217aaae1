/**
 * Drives the live page of LV.1's server in a headless Chromium: `node page.mjs SCENARIO`. The Rust test beside it starts this, once for each
 * scenario, with a database of its own, and ends it by closing its standard input.
 *
 * PROGRAM is the server, DATABASE_URL and OTHER_DATABASE_URL are two empty databases, CHROMIUM is the browser, TOOLS the folder with
 * node_modules. SITE is nginx in front of three servers, and SITE_TOKEN their admin token, for the one scenario that goes through it. With
 * SCREENSHOTS set, the book's pictures are written into that folder.
 */
import assert from "node:assert/strict";
import { spawn } from "node:child_process";
import { once } from "node:events";
import { mkdirSync, mkdtempSync, readFileSync, rmSync } from "node:fs";
import { createRequire } from "node:module";
import net from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";

const { CHROMIUM, DATABASE_URL, OTHER_DATABASE_URL, PROGRAM, SCREENSHOTS, SITE, SITE_TOKEN, TOOLS } = process.env;
const require = createRequire(join(TOOLS, "package.json"));
const puppeteer = require("puppeteer-core");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const TOKEN = "correct-horse-battery-staple";
const TIMEOUT = 20_000;
const CAPACITY = 100;
const SIZES = {
  phone: { width: 390, height: 844, deviceScaleFactor: 2, isMobile: true },
  laptop: { width: 1366, height: 768 },
  projector: { width: 1920, height: 1080 },
};

const servers = new Set();
process.on("exit", () => servers.forEach(server => server.process.kill("SIGKILL")));
process.stdin.resume().on("end", () => process.exit(1));

/** A server of LV.1. Without work between look and sale, two buyers may miss each other on a fast machine. */
async function serve(settings = {}) {
  const environment = {
    PATH: process.env.PATH, HOST: "127.0.0.1", PORT: "0", DATABASE_URL, OVERSOLD_ADMIN_TOKEN: TOKEN,
    STRATEGY: "read-then-write", WORK_MS: "2", DATABASE_POOL_SIZE: "10", ...settings,
  };
  for (const name of Object.keys(environment)) if (environment[name] === null) delete environment[name];
  const server = { log: "", process: spawn(PROGRAM, { env: environment, stdio: ["ignore", "pipe", "pipe"] }) };
  servers.add(server);
  server.process.stderr.on("data", text => { server.log += text; });
  const [line] = await Promise.race([
    once(server.process.stdout, "data"),
    once(server.process, "exit").then(() => { throw new Error(`the server left: ${server.log}`); }),
  ]);
  server.url = String(line).trim().split(" ").pop();
  server.port = new URL(server.url).port;
  return server;
}

async function kill(server) {
  server.process.kill("SIGKILL");
  await once(server.process, "exit");
  servers.delete(server);
}

async function ask(server, method, path, body, headers = {}) {
  const json = { "Content-Type": "application/json", ...headers };
  const response = await fetch(server.url + path, { method, headers: json, body: body && JSON.stringify(body) });
  const text = await response.text();
  return { status: response.status, text, json: () => JSON.parse(text) };
}

async function openSale(server, id, token = TOKEN) {
  const opened = await ask(server, "PUT", `/api/sales/${id}`, { name: "The last tickets", capacity: CAPACITY }, { Authorization: `Bearer ${token}` });
  assert.equal(opened.status, 201, opened.text);
}

const reserve = (server, sale, buyer) => ask(server, "POST", `/api/sales/${sale}/reservations`, { buyer_id: buyer });

/** A page that fails its scenario if its script fails, if its policy blocks anything, or if it asks another server than these. */
async function open(browser, url, { size = "laptop", theme = "dark", motion = "reduce", origins = [] } = {}) {
  const page = await browser.newPage();
  page.faults = [];
  page.on("pageerror", error => page.faults.push(String(error)));
  page.on("console", message => { if (/Content Security Policy|Refused to/.test(message.text())) page.faults.push(message.text()); });
  const known = [new URL(url).origin, ...origins, "data:"];
  page.on("request", request => { if (!known.some(origin => request.url().startsWith(origin))) page.faults.push(`asked ${request.url()}`); });
  await page.setViewport(SIZES[size]);
  await page.emulateMediaFeatures([
    { name: "prefers-color-scheme", value: theme },
    { name: "prefers-reduced-motion", value: motion },
  ]);
  await page.goto(url);
  return page;
}

const textOf = (page, selector) => page.$eval(selector, node => node.textContent);
const shows = (page, selector, pattern) => page.waitForFunction(
  (selector, source) => [...document.querySelectorAll(selector)].some(node => node.checkVisibility() && new RegExp(source).test(node.textContent)),
  { timeout: TIMEOUT, polling: 50 }, selector, pattern.source,
).catch(async () => {
  throw new Error(`${selector} does not show ${pattern}: ${await page.$$eval(selector, nodes => nodes.map(node => node.textContent).join(" | "))}`);
});
const count = (page, selector) => page.$$eval(selector, nodes => nodes.length);

async function press(page, ...keys) {
  for (const key of keys) await page.keyboard.press(key);
}
const focused = page => page.evaluate(() => document.activeElement.id || document.activeElement.textContent.trim());

/** Types over what is in the field that has the focus. */
async function type(page, text) {
  await page.keyboard.down("Control");
  await page.keyboard.press("a");
  await page.keyboard.up("Control");
  await page.keyboard.type(text);
}

async function startRush(page, { buyers = "300", token = TOKEN } = {}) {
  if (await page.$eval("#rush", node => node.hidden)) await page.click("#open-rush");
  await page.focus("#buyers");
  await type(page, buyers);
  await page.focus("#token");
  await type(page, token);
  await press(page, "Enter");
}

async function noViolations(page, when) {
  await page.evaluate(axe);
  const { violations } = await page.evaluate(() => globalThis.axe.run(document, { resultTypes: ["violations"] }));
  const found = violations.map(({ id, help, nodes }) => `${id}: ${help}: ${nodes.slice(0, 3).map(({ html, failureSummary }) => `${html} ${failureSummary}`).join("; ")}`);
  assert.deepEqual(found, [], when);
}

/** Writes a picture, if it is one of the book's and these are wanted. */
async function picture(page, name) {
  if (!SCREENSHOTS || !["projector-dark", "laptop-light", "phone-light", "race-light"].includes(name)) return;
  mkdirSync(SCREENSHOTS, { recursive: true });
  await page.screenshot({ path: join(SCREENSHOTS, `live-${name}.webp`), type: "webp", quality: 82 });
}

const scenarios = {
  async "it fills and shows the oversell in red with its number"(browser) {
    const server = await serve();
    const page = await open(browser, `${server.url}/live`, { motion: "no-preference" });
    await shows(page, "h2", /LV\.1read-then-write/);
    await shows(page, ".empty", /No sale yet/);
    await openSale(server, 1);
    await shows(page, ".verdict", /100 left/);
    assert.equal((await reserve(server, 1, 7)).status, 201);
    await shows(page, ".verdict", /99 left/);
    assert.equal(await page.$eval(".inside .seat", node => node.title), "Ticket 1: confirmed, buyer 7 by instance 1");

    await startRush(page);
    await shows(page, ".said", /Every request is answered/);
    const { id, reserved } = (await ask(server, "GET", "/api/sales/2")).json();
    assert.equal(id, 2);
    assert.ok(reserved > CAPACITY, `it did not oversell: ${reserved} sold`);
    await shows(page, ".sold", new RegExp(`^${reserved}$`));
    await shows(page, ".verdict", new RegExp(`^Oversold by ${reserved - CAPACITY}$`));
    assert.equal(await count(page, ".inside .seat[data-status=confirmed]"), CAPACITY);
    assert.equal(await count(page, ".over .seat[data-status=confirmed]"), reserved - CAPACITY);
    const last = await page.$eval(".over .seat:last-child", node => [node.textContent, getComputedStyle(node).backgroundColor]);
    assert.deepEqual(last, [String(reserved), "rgb(217, 43, 58)"]);
    await shows(page, ".ran p", new RegExp(`300 requests: ${reserved} confirmed`));
    // A screen reader is told the sum, and not every ticket.
    await page.waitForFunction(() => /Oversold by \d+/.test(document.querySelector("#announce").textContent), { timeout: TIMEOUT });
    assert.equal(await count(page, ".seat[aria-live], .seats[aria-live]"), 0);
    return [page];
  },

  async "it reconnects after its instance has died"(browser) {
    const server = await serve();
    await openSale(server, 1);
    const page = await open(browser, `${server.url}/live`);
    await shows(page, ".link", /Live, from instance 1/);
    await kill(server);
    await shows(page, ".link", /Connection lost/);
    assert.ok(await page.$("[data-stale]"), "what is shown is old, and looks like it");
    const next = await serve({ PORT: server.port, INSTANCE: "2" });
    await shows(page, ".link", /Live, from instance 2/);
    assert.equal((await reserve(next, 1, 7)).status, 201);
    await shows(page, ".verdict", /99 left/);
    assert.equal(await page.$("[data-stale]"), null);
    return [page];
  },

  async "it is operable by keyboard alone"(browser) {
    const server = await serve();
    const page = await open(browser, `${server.url}/live`);
    await shows(page, ".empty", /No sale yet/);
    await press(page, "Tab");
    assert.equal(await focused(page), "sale");
    await press(page, "Tab");
    assert.equal(await focused(page), "theme");
    await press(page, "Enter");
    assert.equal(await page.$eval("html", node => node.dataset.theme), "light");
    await press(page, "Tab");
    assert.equal(await focused(page), "open-rush");
    const outline = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
    assert.equal(outline, "solid", "the focus is visible");
    await press(page, "Enter");
    assert.equal(await focused(page), "buyers");
    await type(page, "50");
    await press(page, "Tab", "Tab", "Tab");
    assert.equal(await focused(page), "token");
    await type(page, TOKEN);
    await press(page, "Tab");
    assert.equal(await focused(page), "Open the gate");
    await press(page, "Space");
    await shows(page, ".said", /Every request is answered/);
    await shows(page, ".sold", /^50$/);
    await press(page, "Escape");
    assert.equal(await focused(page), "open-rush");
    assert.ok(await page.$eval("#rush", node => node.hidden));
    return [page];
  },

  async "it has no accessibility violation"(browser) {
    const server = await serve();
    const pages = [];
    for (const theme of ["dark", "light"]) {
      const page = await open(browser, `${server.url}/live/${pages.length + 1}`, { theme, size: pages.length ? "phone" : "laptop" });
      await shows(page, ".empty", /There is no sale/);
      await noViolations(page, `${theme}, empty`);
      await startRush(page, { token: "wrong" });
      await shows(page, ".said", /Admin token missing or wrong/);
      await noViolations(page, `${theme}, refused`);
      await startRush(page);
      await shows(page, ".verdict", /Oversold by/);
      await shows(page, ".said", /Every request is answered/);
      await noViolations(page, `${theme}, oversold`);
      // Nothing is cut off: the page scrolls in one direction only.
      assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${theme}: it is wider than the screen`);
      pages.push(page);
    }
    return pages;
  },

  async "without a token it shows and starts nothing"(browser) {
    const admin = await serve();
    await openSale(admin, 1);
    const server = await serve({ OVERSOLD_ADMIN_TOKEN: null });
    const page = await open(browser, `${server.url}/live`);
    await shows(page, ".verdict", /100 left/);
    assert.ok(await page.$eval("#open-rush", node => node.hidden));
    assert.equal((await reserve(server, 1, 7)).status, 201);
    await shows(page, ".verdict", /99 left/);
    const refused = await page.evaluate(async () => {
      const headers = { "Authorization": "Bearer guessed", "Content-Type": "application/json" };
      const answer = await fetch("/live/rush", { method: "POST", headers, body: '{"buyers": 1, "clicks": 1, "capacity": 1}' });
      return answer.status;
    });
    assert.equal(refused, 403);
    return [page];
  },

  async "the token is in no address no log no storage and no source"(browser) {
    const server = await serve({ RUST_LOG: "trace" });
    const page = await open(browser, `${server.url}/live`);
    const urls = [];
    page.on("request", request => urls.push(request.url() + (request.postData() ?? "")));
    await startRush(page, { buyers: "20" });
    await shows(page, ".said", /Every request is answered/);
    const seen = {
      urls: urls.join(" "), address: page.url(), source: await page.content(), log: server.log,
      storage: await page.evaluate(() => JSON.stringify({ ...localStorage, ...sessionStorage, cookie: document.cookie })),
    };
    assert.ok(seen.urls.includes("/live/rush"), "the request with the token was not seen");
    assert.ok(seen.log.includes("/live/rush"), "the log says nothing at all");
    for (const [place, text] of Object.entries(seen)) assert.ok(!text.includes(TOKEN), `the token is in: ${place}`);
    await page.reload();
    assert.equal(await page.$eval("#token", node => node.value), "");
    return [page];
  },

  async "it says that the database is away and recovers"(browser) {
    const database = new URL(DATABASE_URL);
    const postgres = [Number(database.port || 5432), database.hostname];
    const sockets = new Set();
    let cut = false;
    const proxy = net.createServer(client => {
      if (cut) return client.destroy();
      const upstream = net.connect(...postgres);
      for (const [from, to] of [[client, upstream], [upstream, client]]) {
        sockets.add(from);
        from.on("error", () => {}).on("close", () => { sockets.delete(from); to.destroy(); }).pipe(to);
      }
    });
    await new Promise(listening => proxy.listen(0, "127.0.0.1", listening));
    database.hostname = "127.0.0.1";
    database.port = proxy.address().port;
    const server = await serve({ DATABASE_URL: database.href });
    await openSale(server, 1);
    const page = await open(browser, `${server.url}/live`);
    await shows(page, ".verdict", /100 left/);
    cut = true;
    sockets.forEach(socket => socket.destroy());
    await shows(page, ".notice", /cannot read its database/);
    await shows(page, ".verdict", /100 left/);
    assert.ok(await page.$("[data-stale]"));
    cut = false;
    await page.waitForFunction(() => document.querySelector(".notice").hidden, { timeout: TIMEOUT });
    assert.equal((await reserve(server, 1, 7)).status, 201);
    await shows(page, ".verdict", /99 left/);
    proxy.close();
    return [page];
  },

  async "it shows which instance has sold which ticket"(browser) {
    const three = await Promise.all(["a", "b", "c"].map(name => serve({ INSTANCE: name })));
    await openSale(three[0], 1);
    const page = await open(browser, `${three[2].url}/live`);
    await shows(page, ".link", /from instance c/);
    for (let buyer = 0; buyer < 6; buyer++) await reserve(three[buyer < 3 ? buyer : 1], 1, buyer);
    await shows(page, ".verdict", /94 left/);
    const rows = await page.$$eval(".by li", rows => rows.map(row => [...row.querySelectorAll(".name, .n")].map(node => node.textContent)));
    assert.deepEqual(rows, [["a", "1"], ["b", "4"], ["c", "1"]]);
    assert.equal(await textOf(page, ".feed li"), "Ticket 6buyer 5, instance b");
    return [page];
  },

  async "through nginx it fills with the tickets of all instances"(browser) {
    const site = { url: SITE };
    await openSale(site, 1, SITE_TOKEN);
    const page = await open(browser, `${SITE}/live`);
    await shows(page, ".link", /Live, from instance [123]/);
    const sold = await Promise.all(Array.from({ length: 30 }, (_, buyer) => reserve(site, 1, buyer)));
    assert.deepEqual(sold.filter(({ status }) => status !== 201), []);
    await shows(page, ".feed li", /buyer \d+, instance/);
    await page.waitForFunction(() => document.querySelectorAll(".by li").length === 3, { timeout: TIMEOUT });
    await startRush(page, { token: SITE_TOKEN });
    await shows(page, ".said", /Every request is answered/);
    await shows(page, ".verdict", /^Oversold by \d+$/);
    return [page];
  },

  async "two strategies race beside each other"(browser) {
    // Each has to know the other's address before it starts.
    const [mine, other] = await Promise.all([freePort(), freePort()]);
    const origin = port => `http://127.0.0.1:${port}`;
    const server = await serve({ PORT: mine, LIVE_PEERS: origin(other) });
    await serve({ PORT: other, LIVE_PEERS: origin(mine), STRATEGY: "check-then-decrement", DATABASE_URL: OTHER_DATABASE_URL });
    const page = await open(browser, `${server.url}/live`, { size: "projector", theme: "light", origins: [origin(other)] });
    await shows(page, "h2", /read-then-write/);
    await shows(page, "h2", /check-then-decrement/);
    await startRush(page, { buyers: "200" });
    await shows(page, ".said", /Every request is answered/);
    for (const port of [mine, other]) {
      const sale = await fetch(`${origin(port)}/api/sales/1`).then(answer => answer.json());
      assert.ok(sale.reserved >= CAPACITY, JSON.stringify(sale));
      await shows(page, ".sold", new RegExp(`^${sale.reserved}$`));
    }
    await noViolations(page, "two boards");
    await page.click("#open-rush");
    await picture(page, "race-light");
    return [page];
  },

  async "it moves nothing for those who prefer it"(browser) {
    const server = await serve();
    const moves = {};
    for (const motion of ["reduce", "no-preference"]) {
      const page = await open(browser, `${server.url}/live`, { motion });
      await page.evaluate(() => {
        globalThis.moves = 0;
        const animate = Element.prototype.animate;
        Element.prototype.animate = function (...how) { globalThis.moves++; return animate.apply(this, how); };
      });
      await startRush(page, { buyers: "20" });
      await shows(page, ".said", /Every request is answered/);
      await shows(page, ".sold", /^20$/);
      moves[motion] = await page.evaluate(() => globalThis.moves);
    }
    assert.equal(moves.reduce, 0);
    assert.ok(moves["no-preference"] > 0, "the test sees no motion at all");
    return [];
  },

  async "it can be shown on a phone a laptop and a projector in both themes"(browser) {
    const three = await Promise.all(["1", "2", "3"].map(name => serve({ INSTANCE: name })));
    await openSale(three[0], 1);
    const path = "/api/sales/1/reservations";
    await Promise.all(Array.from({ length: 340 }, (_, buyer) => ask(three[buyer % 3], "POST", path, { buyer_id: buyer })));
    for (const size of Object.keys(SIZES)) {
      for (const theme of ["dark", "light"]) {
        const page = await open(browser, `${three[1].url}/live`, { size, theme });
        await shows(page, ".verdict", /Oversold by/);
        if (size === "laptop") await page.click("#open-rush");
        assert.ok(await page.evaluate(() => document.documentElement.scrollWidth <= innerWidth), `${size}: it is wider than the screen`);
        await picture(page, `${size}-${theme}`);
      }
    }
    return [];
  },
};

async function freePort() {
  const server = net.createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const { port } = server.address();
  server.close();
  await once(server, "close");
  return String(port);
}

const run = scenarios[process.argv[2]];
assert.ok(run, `there is no scenario ${process.argv[2]}; there is ${Object.keys(scenarios).join(", ")}`);
const profile = mkdtempSync(join(tmpdir(), "chromium-"));
// Whoever runs this as root, as in a container, has no sandbox; the only pages are those of the servers above.
const browser = await puppeteer.launch({ executablePath: CHROMIUM, userDataDir: profile, args: ["--no-sandbox", "--disable-dev-shm-usage"] });
let code = 0;
try {
  const pages = await run(browser);
  for (const page of pages) assert.deepEqual(page.faults, []);
} catch (error) {
  code = 1;
  console.error(error);
  for (const server of servers) console.error(server.log.slice(-2000));
} finally {
  await browser.close();
  rmSync(profile, { recursive: true, force: true });
}
process.exit(code);
