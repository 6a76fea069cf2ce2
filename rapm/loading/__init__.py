"""How a teacher is found, checked and read: folders, hub ids, single files, style LoRAs."""
