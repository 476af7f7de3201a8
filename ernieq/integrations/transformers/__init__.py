"""Packed checkpoints in ``AutoModelForCausalLM.from_pretrained``, once ``import ernieq`` has run.

    versions.py     which versions of transformers are supported, and what is said about others
    hook.py         registers the method when transformers loads its list of quantization methods
    config.py       the ``quantization_config`` of config.json
    quantizer.py    what transformers calls while it loads, saves and dequantizes
    source.py       opens and checks the directory before anything is loaded
    modules.py      modules that first receive the packed tensors and then compute with them
    swap.py         puts them into transformers' model
    dequantize.py   decodes them into transformers' own modules
    save.py         tensors and manifest of ``save_pretrained``
    lm_eval.py      ``python -m ernieq.integrations.transformers.lm_eval``: lm-evaluation-harness

transformers builds the model on the meta device and calls the quantizer, which replaces modules; fills every
tensor by its name in the checkpoint; and calls the quantizer again, which turns what was filled into modules of
``ernieq.decode``. Experts, which transformers fuses in memory, stay one by one here, as they are stored.

Left out: training, tensor parallelism, and offloading to the CPU or a disk of what shall run on a GPU.
"""
