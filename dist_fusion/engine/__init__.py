"""The model inside DeepSpeed. The only package that imports deepspeed."""
