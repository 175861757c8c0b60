"""A read-only view of checkpoints on the disk: headers, names, bytes, adapters, and the files beside them.

A checkpoint has shards, each of which is one weight file. A shard has a header, with the place of each tensor, and a
reader of the file's bytes.

    checkpoint         opens a folder or a file and returns a Checkpoint
    weight_files       opens one shard: safetensors_header parses a .safetensors file, torch_file reads PyTorch's form
    reader             reads bytes while other processes may change the file
    lora               opens an adapter over its base; lora_ties settles whether head and embedding stay one tensor;
                       lora_experts and lora_rows find the files' tensors that transformers fuses as it loads them
    naming, renames    names of tensors as text, and the one table of names that mean the same
    wrappers           the model's own names for a checkpoint that was saved inside a wrapper
    model_parts        heads, embeddings and buffers, by the names of their tensors
    quantization       recognises quantised checkpoints, which have codes in place of numbers, and names the way out
    dequantized        presents FP8 and MXFP4 as their values, which scaled_reader gives to the engines
    transposed         presents experts that the other side has transposed
    parts              makes one checkpoint of the files that a training's processes saved (rank_files,
                       distributed_checkpoint), whose tensors piecewise_reader reads
    sidecars           decides which files beside the weights an output gets; custom_code finds the code among them
    tokenizer          compares the token ids of two checkpoints
"""
