// Runs a model that `treadle export MODEL --to web -o FOLDER` wrote, on WebGPU.
//
//   import {load} from "./treadle.js";
//   const model = await load(".");
//   const outputs = await model.run({tokens: [101, 7592, 102]});   // typed arrays, by the outputs' names
//
// Inputs are arrays of numbers in row-major order, of the shapes in `model.inputs`. An f16 or bf16 number is its bits.
// Weights stay on the device; a run copies its inputs there, enqueues the launches of the table, and waits once.

const ARRAYS = {
  f32: Float32Array, i64: Int32Array, i32: Int32Array, i16: Int16Array, f16: Uint16Array, bf16: Uint16Array,
  i8: Int8Array, u8: Uint8Array, bool: Uint8Array,
};
const STATUS_WORDS = 4;
const ALIGNMENT = 256;

function check(condition, message) {
  if (!condition) throw new Error(message);
}

async function fetched(url) {
  const response = await fetch(url);
  check(response.ok, `${url}: ${response.status} ${response.statusText}`);
  return response;
}

// Run a function, and throw the first error of WebGPU in it.
async function guarded(device, action) {
  const kinds = ["validation", "out-of-memory", "internal"];
  kinds.forEach((kind) => device.pushErrorScope(kind));
  let result;
  try {
    result = await action();
  } finally {
    for (const _ of kinds) {
      const error = await device.popErrorScope();
      if (error && result !== null) throw new Error(error.message);
    }
  }
  return result;
}

// Load a model. `progress` is called with a text before each part.
export async function load(folder, progress = () => {}) {
  check(navigator.gpu, "this browser has no WebGPU");
  const adapter = await navigator.gpu.requestAdapter();
  check(adapter, "WebGPU has no device");
  const device = await adapter.requestDevice();
  const facts = await (await fetched(`${folder}/model.json`)).json();
  return guarded(device, async () => {
    const usage = GPUBufferUsage.STORAGE | GPUBufferUsage.COPY_SRC | GPUBufferUsage.COPY_DST;
    const buffers = facts.table.spaces.map((space) => device.createBuffer({size: space.bytes, usage}));
    for (const [number, file] of facts.files.entries()) {
      progress(`weights, file ${number + 1} of ${facts.files.length}`);
      const data = await (await fetched(`${folder}/${file.name}`)).arrayBuffer();
      for (const part of file.parts) {
        device.queue.writeBuffer(buffers[part.space], part.at, data, part.begin, part.bytes);
      }
    }
    const kernels = [];
    for (const kernel of facts.kernels) {
      progress(`kernel ${kernel.entry}`);
      const begin = performance.now();
      kernels.push(await compiled(device, kernel, await (await fetched(`${folder}/${kernel.file}`)).text()));
      kernels.at(-1).seconds = (performance.now() - begin) / 1000;
    }
    return new Model(device, facts, buffers, kernels);
  });
}

async function compiled(device, kernel, code) {
  const types = [...kernel.written.map((written) => written ? "storage" : "read-only-storage"), "uniform"];
  const layout = device.createBindGroupLayout({
    entries: types.map((type, binding) => ({binding, visibility: GPUShaderStage.COMPUTE, buffer: {type}})),
  });
  const pipeline = await device.createComputePipelineAsync({
    layout: device.createPipelineLayout({bindGroupLayouts: [layout]}),
    compute: {module: device.createShaderModule({code}), entryPoint: kernel.entry},
  });
  return {name: kernel.entry, layout, pipeline};
}

export class Model {
  constructor(device, facts, buffers, kernels) {
    Object.assign(this, {device, facts, buffers, kernels});
    this.inputs = facts.inputs;
    this.outputs = facts.outputs;
    const sizes = facts.launches.map((launch) => Math.ceil(launch.numbers.length * 4 / ALIGNMENT) * ALIGNMENT);
    const numbers = new Int32Array(sizes.reduce((a, b) => a + b, ALIGNMENT) / 4);
    const uniform = device.createBuffer({
      size: numbers.byteLength, usage: GPUBufferUsage.UNIFORM | GPUBufferUsage.COPY_DST,
    });
    let at = 0;
    this.launches = facts.launches.map((launch, number) => {
      numbers.set(launch.numbers, at / 4);
      const resources = launch.bindings.map(([space, offset, size]) => ({buffer: buffers[space], offset, size}));
      resources.push({buffer: uniform, offset: at, size: Math.ceil(launch.numbers.length / 4) * 16});
      at += sizes[number];
      const {layout, pipeline} = kernels[launch.kernel];
      const entries = resources.map((resource, binding) => ({binding, resource}));
      return {pipeline, group: device.createBindGroup({layout, entries}), blocks: launch.blocks};
    });
    device.queue.writeBuffer(uniform, 0, numbers);
    device.lost.then((info) => { this.lost = info.message || info.reason; });
  }

  // Return the outputs of a run on these inputs, by name.
  async run(inputs) {
    check(!this.lost, `the device was lost: ${this.lost}`);
    const {device, facts, buffers} = this;
    return guarded(device, async () => {
      for (const port of facts.inputs) {
        check(port.name in inputs, `input ${port.name} is missing`);
        this.write(port, inputs[port.name]);
      }
      const encoder = device.createCommandEncoder();
      const pass = encoder.beginComputePass();
      for (const {pipeline, group, blocks} of this.launches) {
        pass.setPipeline(pipeline);
        pass.setBindGroup(0, group);
        pass.dispatchWorkgroups(blocks);
      }
      pass.end();
      const reads = facts.outputs.map((port) => ({space: port.space, bytes: bytesOf(port)}));
      if (facts.status.length) reads.push({space: facts.status_space, bytes: facts.status.length * STATUS_WORDS * 4});
      let total = 0;
      for (const read of reads) {
        read.begin = total;
        total += Math.ceil(read.bytes / 16) * 16;
      }
      const copy = device.createBuffer({size: Math.max(total, 16), usage: GPUBufferUsage.MAP_READ | GPUBufferUsage.COPY_DST});
      for (const {space, bytes, begin} of reads) {
        if (bytes) encoder.copyBufferToBuffer(buffers[space], 0, copy, begin, Math.ceil(bytes / 4) * 4);
      }
      device.queue.submit([encoder.finish()]);
      await copy.mapAsync(GPUMapMode.READ);
      const data = copy.getMappedRange().slice(0);
      copy.destroy();
      if (facts.status.length) this.checkStatus(new Int32Array(data, reads.at(-1).begin, facts.status.length * STATUS_WORDS));
      return Object.fromEntries(facts.outputs.map((port, i) => [
        port.name, new ARRAYS[port.dtype](data, reads[i].begin, count(port.shape)),
      ]));
    });
  }

  write(port, values) {
    const n = count(port.shape);
    check(values.length === n, `input ${port.name} has ${values.length} numbers, not ${n} (${port.shape.join(" x ")})`);
    const array = new ARRAYS[port.dtype](Math.ceil(bytesOf(port) / 4) * 4 / ARRAYS[port.dtype].BYTES_PER_ELEMENT);
    for (let i = 0; i < n; i += 1) {
      array[i] = Number(values[i]);
      const exact = port.dtype === "f32" || array[i] === Number(values[i]);
      check(exact, `input ${port.name} has ${values[i]}, which is no number of ${port.dtype} on the device`);
    }
    if (n && port.space !== null) this.device.queue.writeBuffer(this.buffers[port.space], 0, array);
  }

  // Throw the first error that a kernel reported, and clear the status words.
  checkStatus(words) {
    for (const [number, where] of this.facts.status.entries()) {
      const [kind, value, size, row] = words.subarray(number * STATUS_WORDS);
      if (kind) {
        this.device.queue.writeBuffer(this.buffers[this.facts.status_space], 0, new Int32Array(words.length));
        throw new Error(kind === 1 ? `${where}: index ${value} is outside an axis of size ${size}`
          : `${where}: row ${row} has no room after position ${value} of ${size}`);
      }
    }
  }
}

function count(shape) {
  return shape.reduce((a, b) => a * b, 1);
}

function bytesOf(port) {
  return count(port.shape) * ARRAYS[port.dtype].BYTES_PER_ELEMENT;
}
