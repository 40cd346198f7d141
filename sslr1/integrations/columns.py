"""Types of a row's columns. "string", "int64", "float64" and "image" are themselves; [kind] is a list of it, a dict a
structure."""


def arrow(kind):
    """The pyarrow type. An image is what Hugging Face's data sets store: a structure of `bytes` and `path`."""
    import pyarrow as pa

    if isinstance(kind, dict):
        return pa.struct([(name, arrow(part)) for name, part in kind.items()])
    if isinstance(kind, list):
        return pa.list_(arrow(kind[0]))
    if kind == "image":
        return pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return getattr(pa, kind)()


def features(kind):
    """What `datasets.Features.from_dict` reads, so that images come back decoded. Lists are written in the way that its
    versions before 4 know too."""
    if isinstance(kind, dict):
        return {name: features(part) for name, part in kind.items()}
    if isinstance(kind, list):
        return {"feature": features("image"), "_type": "Sequence"} if kind == ["image"] else [features(kind[0])]
    return {"_type": "Image"} if kind == "image" else {"dtype": kind, "_type": "Value"}
