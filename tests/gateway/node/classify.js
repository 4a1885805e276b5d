// node classify.js ADDRESS PROTOS FILE: waits until the gateway serves, classifies the file, and goes on telling of its
// health until it serves no more. One line of JSON for each.
import { readFileSync } from "node:fs";
import { promisify } from "node:util";

// The documentation shows what follows.
import grpc from "@grpc/grpc-js";
import { loadSync } from "@grpc/proto-loader";
import { protoPath } from "grpc-health-check";

const [address, protos, image] = process.argv.slice(2);
const options = { includeDirs: [protos], keepCase: true, longs: String, enums: String, defaults: true };
const load = (file) => grpc.loadPackageDefinition(loadSync(file, options));
const { ImageService } = load("protos/gateway/v1/image_service.proto").sluice.gateway.v1;
const { Health } = load(protoPath).grpc.health.v1;
const service = "sluice.gateway.v1.ImageService";
const client = new ImageService(address, grpc.credentials.createInsecure());
const health = new Health(address, grpc.credentials.createInsecure());
const classify = promisify(client.Classify.bind(client));

let isAnswered = false;
// Has no end of its own, and leaving the loop alone would keep it open.
const watch = health.Watch({ service });
try {
  // Each change of the gateway's health is a message.
  for await (const { status } of watch) {
    console.log(JSON.stringify({ status }));
    if (status === "SERVING") {
      const { prediction, model, model_version } = await classify({ image: { encoded: readFileSync(image) } });
      console.log(JSON.stringify({ label: prediction.label, name: prediction.name, model, model_version }));
      isAnswered = true;
    } else if (isAnswered) watch.cancel();
  }
} catch (error) {
  if (error.code !== grpc.status.CANCELLED) throw error;
}
client.close();
health.close();
// Up to here.
