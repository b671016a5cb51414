"""ZeroGPU's process border, emulated."""

from __future__ import annotations

import multiprocessing
import pickle

import torch


def other_process(task_function):
    """`spaces.GPU` as on ZeroGPU: arguments and results are pickled, the forked worker is thrown away."""

    def call(task):
        results = multiprocessing.get_context("fork").SimpleQueue()
        arguments = pickle.dumps(task)

        def work():
            torch.set_num_threads(1)  # the parent's threads are not there after a fork
            try:
                for result in task_function(pickle.loads(arguments)):
                    results.put(pickle.dumps(result))
                results.put(None)
            except BaseException as error:
                results.put(pickle.dumps(RuntimeError(type(error).__name__)))

        worker = multiprocessing.get_context("fork").Process(target=work, daemon=True)
        worker.start()
        try:
            while (data := results.get()) is not None:
                result = pickle.loads(data)
                if isinstance(result, RuntimeError):
                    raise result
                yield result
        finally:
            worker.kill()
            worker.join()

    return call
