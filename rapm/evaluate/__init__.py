"""How good a student is: the embedded teacher's judge; FID, KID and CLIP score of any teacher."""
