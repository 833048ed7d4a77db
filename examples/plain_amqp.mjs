// Submits a task from Node.js: the three fields, as any program may publish them.
// In the checkout, since Node.js looks for amqplib in the folders above this file:
//   npm install amqplib
//   . .inferq/env && node examples/plain_amqp.mjs https://example.com/page.png
import { randomUUID } from "node:crypto";
import amqp from "amqplib";

if (!process.argv[2] || !process.env.INFERQ_AMQP_URL) {
  console.error("usage: INFERQ_AMQP_URL=amqp://… node plain_amqp.mjs IMAGE_URL");
  process.exit(1);
}
const task = { task_id: `ocr_${randomUUID().slice(0, 8)}`, image_url: process.argv[2], task_type: "ocr" };
const connection = await amqp.connect(process.env.INFERQ_AMQP_URL);
const channel = await connection.createConfirmChannel();
const body = Buffer.from(JSON.stringify(task));
channel.publish("inference.tasks", "task_type.ocr", body, { persistent: true, mandatory: true });
await channel.waitForConfirms();
await connection.close();
console.log(task.task_id);
