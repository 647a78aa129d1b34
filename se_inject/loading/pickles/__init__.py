"""Read pickles of torch.save and pickle.dump with our own unpickler: names first, then data, then checks of what came out.

In: the bytes of a pickle and its storages. Out: modules and tensors. Must not know: TorchScript, exported programs, zoos.
"""
