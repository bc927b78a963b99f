"""Sound samples of what :mod:`tools.fuzz_texts` damages: other trainers' settings, lists of tags, axes."""

from __future__ import annotations

FOREIGN: dict[str, tuple[bytes, ...]] = {
    "sh": (
        b"accelerate launch --num_cpu_threads_per_process 1 sd-scripts/train_network.py \\\n"
        b'  --pretrained_model_name_or_path="/a b/m.safetensors" --train_data_dir=img \\\n'
        b"  --network_module=networks.lora --network_dim=16 --network_alpha=8 --learning_rate=1e-4\n",
        b"python train_text_to_image_lora.py --rank=4 --train_data_dir=x --max_train_steps=100\n",
    ),
    "bat": (
        b"@echo off\r\nset M=C:\\m.safetensors\r\naccelerate launch train_network.py ^\r\n"
        b" --pretrained_model_name_or_path=%M% --network_dim=8 --train_data_dir=D:\\i ^\r\n"
        b" --network_alpha 4\r\n",
    ),
    "toml": (
        b'[general]\ncaption_extension = ".txt"\n[[datasets]]\nresolution = 512\nbatch_size = 2\n'
        b'[[datasets.subsets]]\nimage_dir = "x"\nnum_repeats = 10\n',
        b'pretrained_model_name_or_path = "m"\nnetwork_dim = 4\ntrain_data_dir = "x"\n'
        b'network_module = "networks.lora"\n',
    ),
    "json": (
        b'{"LoRA_type": "Standard", "network_dim": 8, "train_data_dir": "x", "learning_rate": 0.0001,'
        b' "epoch": 2}',
        b'{"training_method": "LORA", "lora_rank": 16, "model_type": "STABLE_DIFFUSION_15", "epochs": 10,'
        b' "optimizer": {"optimizer": "ADAMW"},'
        b' "concepts": [{"path": "x", "text": {"prompt_source": "sample"}}]}',
        b'{"--model_type": "lora", "--model_family": "sdxl", "--lora_rank": 16,'
        b' "--data_backend_config": "b.json"}',
        b'{"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["to_q", "to_k"]}',
    ),
    "yaml": (
        b"job: extension\nconfig:\n  name: x\n  process:\n  - type: sd_trainer\n    network:\n"
        b"      type: lora\n      linear: 16\n      linear_alpha: 16\n    datasets:\n"
        b"    - folder_path: x\n      resolution: [512]\n    train:\n      batch_size: 1\n"
        b"      steps: 100\n      lr: 1e-4\n    model:\n      name_or_path: m\n",
    ),
}
"""By the ending of the file."""
TAG_LISTS: dict[str, tuple[bytes, ...]] = {
    "csv": (
        b"tag_id,name,category,count\n1,1girl,0,5\n2,solo,0,4\n3,rating:safe,9,1\n",
        b'name,category\r\n"a, b",4\r\n:d,0\r\n',
    ),
    "txt": (b"cat\ndog\n",),
}
IMPLICATIONS = (b"antecedent_name,consequent_name\na,b\nb,c\n", b"tag,implies\nkitten,cat\n")
AXES = (b"strength=0,0.5,1", b"seed=1,2", b"sampler=Euler,DDIM")
THRESHOLDS = (b"character=0.8", b"artist=off", b"0.35")
