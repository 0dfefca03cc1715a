// Prefill and decode times of llama.cpp on a model of llama_cpp_model.py; for llama_cpp.py.
//
//     node llama_cpp_rows.mjs PEER MODEL.gguf SHAPE.json
//
// PEER is a folder with node-llama-cpp, whose prebuilt llama.cpp chooses the kernels of this processor. One round is one
// prompt of random tokens and one greedy answer; the times are printed as JSON. The time to the first token is the
// prefill, as on our side.

import fs from "node:fs";
import path from "node:path";
import {performance} from "node:perf_hooks";
import {pathToFileURL} from "node:url";

const [peer, modelPath, shapePath] = process.argv.slice(2);
const shape = JSON.parse(fs.readFileSync(shapePath, "utf8"));
const folder = path.resolve(peer, "node_modules", "node-llama-cpp");
const {version} = JSON.parse(fs.readFileSync(path.join(folder, "package.json"), "utf8"));
const {release} = JSON.parse(fs.readFileSync(path.join(folder, "llama", "binariesGithubRelease.json"), "utf8"));
const {getLlama} = await import(pathToFileURL(path.join(folder, "dist", "index.js")));

const kernels = [];  // what the library says of itself while it loads
const llama = await getLlama({
    gpu: false, build: "never", maxThreads: shape.threads, logLevel: "debug",
    logger: (_, message) => kernels.push(...message.split("\n").filter((line) => /load_backend|AMX/.test(line)))
});
const model = await llama.loadModel({modelPath, gpuLayers: 0});
const context = await model.createContext({
    contextSize: shape.context, batchSize: shape.batch, threads: shape.threads, flashAttention: shape.flash
});
const sequence = context.getSequence();

let state = 1;
function randomToken() {  // any token but the special ones and the bytes
    state = (state * 1103515245 + 12345) % 2147483648;
    return 300 + state % (shape.vocab - 300);
}

async function round(work) {
    await sequence.clearHistory();
    const prompt = Array.from({length: work.prompt}, randomToken);
    const longest = Math.max(...work.tokens);
    const row = {};
    let count = 0;
    let first = 0;
    const start = performance.now();
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        const now = performance.now();
        count += 1;
        if (count === 1) {
            row.prefill = now - start;
            first = now;
        }
        if (work.tokens.includes(count))
            row[`decode ${count}`] = now - first;
        if (count === longest)
            break;
    }
    if (count < longest)
        throw new Error(`expected ${longest} tokens, got ${count}`);
    return row;
}

await round({prompt: 8, tokens: [2]});  // pages the weights in
const rounds = [];
for (let i = 0; i < shape.rounds; i++)
    rounds.push(await round(shape));
const kernel = kernels.map((line) => line.replace(/\S*\//, "").trim());  // without folders of this machine
console.log(JSON.stringify({version: `node-llama-cpp ${version}, llama.cpp ${release}`, kernels: kernel, rounds}));
process.exit(0);
