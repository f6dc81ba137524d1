"""From files to packed batches: records, chat template, token store, packing, order."""
