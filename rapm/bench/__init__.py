"""`rapm bench`: the kernels on the shapes of a UNet pass, beside what else there is."""
