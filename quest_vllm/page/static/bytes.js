/* The byte model: what one decode step of one request reads from the KV cache. The same arithmetic as
   quest_vllm/metadata.py, over all layers; a page summary is as large as one token's key and value, a key half of that.
   Spread over layers by layer_shares, a budget is as many pages in all, or a few less where a layer's part covers the
   context. */

/** @returns {boolean} whether a request with this budget and context selects pages */
export function isSparse(info, context, budget) {
  const pages = Math.ceil(context / info.page_size);
  return budget > 0 && Math.ceil(Math.max(budget, info.min_budget) / info.page_size) < pages;
}

/** @returns {number} pages whose keys a head reads to choose */
function pagesListed(take, pages, forced) {
  if (take <= forced || take >= pages) return 0;
  return Math.min(take + Math.ceil(take / 2), pages) - Math.max(Math.floor(take / 2), forced);
}

/** @returns {{read: number, dense: number}} bytes of one step at `context` tokens */
export function stepBytes(info, context, budget) {
  const token = info.vector_bytes * info.kv_heads;
  const dense = context * token * info.layers;
  if (!isSparse(info, context, budget)) return { read: dense, dense };
  const pages = Math.ceil(context / info.page_size);
  const selected = Math.ceil(Math.max(budget, info.min_budget) / info.page_size);
  const missing = pages * info.page_size - context;
  const denseLayers = info.dense_layers.filter((layer) => layer < info.layers).length;
  const listed = info.reads_keys ? pagesListed(selected, pages, info.min_budget / info.page_size) : 0;
  const choosing = (info.scores_pages ? pages : 0) + (listed * info.page_size) / 2;
  const sparseTokens = selected * info.page_size - missing + choosing;
  const read = token * (sparseTokens * (info.layers - denseLayers) + context * denseLayers);
  return { read, dense };
}

/** @returns {string} bytes with a binary unit and three digits */
export function showBytes(bytes) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (bytes >= 1024 && unit < units.length - 1) {
    bytes /= 1024;
    unit += 1;
  }
  return `${bytes >= 100 || unit === 0 ? bytes.toFixed(0) : bytes.toPrecision(3)} ${units[unit]}`;
}
