// Keeps the site's files for visits without a network, and isolates its pages from other sites so
// that WebAssembly may use threads. It never asks for anything outside of this folder.
// SPDX-License-Identifier: Apache-2.0

const PREFIX = `dsgnn ${registration.scope} `, CACHE = `${PREFIX}VERSION`;
const PAGES = ["./", "dsgnn.js", "worker.js"];

addEventListener("install", (event) => {
  skipWaiting();
  event.waitUntil(caches.open(CACHE).then((cache) =>
    cache.addAll(PAGES.map((page) => new Request(page, {cache: "no-cache"})))));
});

addEventListener("activate", (event) => event.waitUntil((async () => {
  for (const name of await caches.keys()) {
    if (name.startsWith(PREFIX) && name !== CACHE) await caches.delete(name);
  }
  await clients.claim();
})()));

async function kept(request) {
  const cache = await caches.open(CACHE);
  const name = request.url.replace(/[?#].*$/, "").replace(/index\.html$/, "");
  const found = await cache.match(name);
  if (found) return found;
  const response = await fetch(request, {cache: "no-cache"});
  if (response.status === 200) await cache.put(name, response.clone());
  return response;
}

function isolated(response) {
  const headers = new Headers(response.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  const {status, statusText} = response;
  return new Response(response.body, {headers, status, statusText});
}

addEventListener("fetch", (event) => {
  const {request} = event;
  if (request.method !== "GET" || !request.url.startsWith(registration.scope)) return;
  event.respondWith(kept(request).then(isolated));
});
