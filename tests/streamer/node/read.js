// node read.js ADDRESS PROTOS REQUEST: reads an epoch by StreamBatches, compares the checksum of every batch, and
// prints how many samples came, in how many batches, and the SHA-256 over indices, images and labels of each.
import { createHash } from "node:crypto";
import { once } from "node:events";
import path from "node:path";

import { crc32c } from "./crc32c.js";

// docs/streaming.md shows what follows.
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";

const [address, protos, request] = process.argv.slice(2);
const file = "protos/streamer/v1/sample_service.proto";
// 64-bit numbers come as strings: JavaScript's own are exact up to 2 ** 53 only.
const options = { includeDirs: [protos], keepCase: true, longs: String, defaults: true };
const definition = loadSync(file, options);
const { SampleService } = grpc.loadPackageDefinition(definition).sluice.streamer.v1;
const client = new SampleService(address, grpc.credentials.createInsecure(), {
  "grpc.max_receive_message_length": 32 * 1024 * 1024,
});

const { plan } = JSON.parse(request);
const digest = createHash("sha256");
let numSamples = 0, numBatches = 0, position = 0n;
// Waiting inside the loop is the backpressure: HTTP/2 stops the streamer.
for await (const batch of client.StreamBatches(JSON.parse(request))) {
  const indices = uint64s(batch.indices);
  check(BigInt(batch.position) === position, `batch at ${batch.position}, where ${position} was due`);
  check(batch.crc32c === crc32c(header(plan, batch), indices, batch.images, batch.labels), "damaged batch");
  digest.update(indices).update(batch.images).update(batch.labels);
  numSamples += batch.num_samples;
  numBatches += 1;
  position = BigInt(batch.next_position);
  // Once this has been trained on, `position` is the whole state: `start_position` of another request.
}

// As the comment on Batch.crc32c says it.
function header(plan, batch) {
  const { seed = 0, epoch = 0, world_size, rank = 0 } = plan;
  return uint64s([seed, epoch, world_size || 1, rank, batch.position, batch.next_position, batch.num_samples]);
}

function uint64s(numbers) {
  return Buffer.from(BigUint64Array.from(numbers, BigInt).buffer);
}
// Up to here.

function check(holds, message) {
  if (!holds) throw new Error(message);
}

// The same service that a client of the seed's own file calls: sample by sample, in file order.
const { MnistService } = grpc.loadPackageDefinition(loadSync(path.join(protos, "protos/mnist.proto"), options));
const single = new MnistService(address, grpc.credentials.createInsecure());
const singleDigest = createHash("sha256");
let numSingle = 0;
const samples = single.GetTrainingSamples({ dataset: plan.dataset });
samples.on("data", ({ image, label, index }) => {
  singleDigest.update(image).update(`${index} ${label};`);
  numSingle += 1;
});
await once(samples, "end");

console.log(JSON.stringify({
  samples: numSamples, batches: numBatches, sha256: digest.digest("hex"),
  single: numSingle, single_sha256: singleDigest.digest("hex"),
}));
client.close();
single.close();
