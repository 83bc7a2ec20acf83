"""Programs that N real processes run side by side, talking by torch.distributed.

    class MeanOfGradients(SPMDProgram):
        def spmd_main(self, node: SPMDNode) -> None:
            for step in range(node.total_steps):
                loss = node.backward(step)
                for parameter in node.model.parameters():
                    torch.distributed.all_reduce(parameter.grad)
                ...
                node.report(step, loss, lr=0.1)

    Trainer(model, data).fit(strategy=SPMDProgram…, num_nodes=2, max_steps=10, processes=True)

A recipe (`torchft.strategies.Recipe`) is the better way to write a strategy: it also runs as rows
of one process, on real groups that come and go, and at a parameter server. A program is for code
that was written as one process of many (`torchft.compat`): its members are fixed, and a process
that fails ends the run.
"""
