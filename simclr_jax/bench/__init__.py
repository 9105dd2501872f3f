"""How fast the parts of a run are: `python -m simclr_jax.bench input|step|loss|e2e`.

Machines drift, so what is compared is run in turns within one call. TensorFlow is needed only for
`input` and `e2e` of data that are not placed on the device.
"""
