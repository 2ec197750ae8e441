// Run a `web` export in transformers.js: node web_features.cjs EXPORT PICTURE IMAGES.json OUT.json
// Run by test_web.py; RADIO_DISTILL_NODE is a folder in which @huggingface/transformers is installed.
const { createRequire } = require("node:module");
const fs = require("node:fs");
const path = require("node:path");

const transformers = createRequire(path.join(process.env.RADIO_DISTILL_NODE, "index.js"))("@huggingface/transformers");
const { AutoModel, AutoProcessor, RawImage, Tensor, env, pipeline } = transformers;

async function main(folder, picture, images, out) {
  env.localModelPath = path.dirname(folder);
  env.allowRemoteModels = false;
  const name = path.basename(folder);
  const { data, dims } = JSON.parse(fs.readFileSync(images));
  const results = { version: env.version };
  for (const dtype of ["fp32", "fp16", "q8"]) {
    const model = await AutoModel.from_pretrained(name, { dtype });
    const outputs = await model({ pixel_values: new Tensor("float32", Float32Array.from(data), dims) });
    results[dtype] = Object.fromEntries(Object.entries(outputs).map(([key, x]) => [key, { dims: x.dims, data: Array.from(x.data) }]));
  }
  const processor = await AutoProcessor.from_pretrained(name);
  const { pixel_values } = await processor(await RawImage.read(picture));
  results.pixels = { dims: pixel_values.dims, data: Array.from(pixel_values.data) };
  const extract = await pipeline("image-feature-extraction", name, { dtype: "fp32" });
  results.pipeline = { dims: (await extract(picture)).dims, pooled: (await extract(picture, { pool: true })).dims };
  fs.writeFileSync(out, JSON.stringify(results));
}

main(...process.argv.slice(2)).catch((error) => {
  console.error(error);
  process.exit(1);
});
