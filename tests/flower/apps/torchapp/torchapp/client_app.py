"""The client, which seeds itself: whoever runs it gets the same numbers."""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from torchapp.task import Net, load_data, load_test, test
from torchapp.task import train as train_net

app = ClientApp()


@app.train()
def train(msg: Message, context: Context):
    torch.set_num_threads(1)
    partition = context.node_config["partition-id"]
    torch.manual_seed(1000 * msg.content["config"]["server-round"] + partition)
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader = load_data(
        partition, context.node_config["num-partitions"], context.run_config["batch-size"]
    )
    loss = train_net(net, loader, context.run_config["local-epochs"], msg.content["config"]["lr"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(loader.dataset)})
    return Message(
        RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=msg
    )


@app.evaluate()
def evaluate(msg: Message, context: Context):
    net = Net()
    net.load_state_dict(msg.content["arrays"].to_torch_state_dict())
    loader = load_test()
    loss, accuracy = test(net, loader)
    metrics = {"eval_loss": loss, "eval_acc": accuracy, "num-examples": len(loader.dataset)}
    return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=msg)
