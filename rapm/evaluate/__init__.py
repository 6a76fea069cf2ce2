"""How good a student is: at each validation; by the embedded teacher's judge; by FID, KID and CLIP score."""
