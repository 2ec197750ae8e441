"""Entry points of `torch.hub.load`: students, and teachers with upsamplers, that were trained with this repository.

model = torch.hub.load(REPOSITORY, "student", "runs/stage3", source="local")
model = torch.hub.load(REPOSITORY, "upsampler", "runs/upsampler_siglip_3x", source="local")
model = torch.hub.load(REPOSITORY, "upsampler", "runs/upsampler_any_2x", teacher="siglip", source="local")
"""

dependencies = ["torch", "torchvision", "timm", "safetensors"]


def student(path, device="cpu"):
    """A trained student: `encode(images)` gives summary and map, `encode_adaptors(images)` also what it predicts of teachers.

    path: run folder, checkpoint, export (hf, radio), Hugging Face folder or hub id of a RADIO model, or a .pth.tar.
    """
    from radio_distill import load_student

    return load_student(path).to(device)


def upsampler(path, device="cpu", dtype=None, chunk=None, teacher=None):
    """A trained upsampler around its teacher: `encode(images)` gives the summary and a map `factor` times as fine.

    path: run folder, checkpoint or folder of the upsampler; the teacher's weights come from where its card says.
    dtype: torch.float32 (the default) or torch.bfloat16. chunk: most teacher images in one forward; None: all.
    teacher: name or path of a card, for an upsampler of kind `any`; None: the teacher that it was trained with.
    """
    from radio_distill import Upsampled, load_card, load_teacher, load_upsampler

    saved = load_upsampler(path, None if teacher is None else load_card(teacher))
    return Upsampled(load_teacher(saved.card).to(device, dtype), saved, chunk=chunk)
