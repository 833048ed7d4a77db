"""Submits a task with pika alone: it publishes the three fields that any program may publish.

. .inferq/env && python examples/plain_amqp.py https://example.com/page.png
"""

import json
import os
import sys
import uuid

import pika

if len(sys.argv) != 2 or "INFERQ_AMQP_URL" not in os.environ:
    sys.exit("usage: INFERQ_AMQP_URL=amqp://… python plain_amqp.py IMAGE_URL")
task = {"task_id": f"ocr_{uuid.uuid4().hex[:8]}", "image_url": sys.argv[1], "task_type": "ocr"}
connection = pika.BlockingConnection(pika.URLParameters(os.environ["INFERQ_AMQP_URL"]))
channel = connection.channel()
channel.confirm_delivery()
durable = pika.BasicProperties(delivery_mode=2)
channel.basic_publish("inference.tasks", "task_type.ocr", json.dumps(task), durable, mandatory=True)
connection.close()
print(task["task_id"])
