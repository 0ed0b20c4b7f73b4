"""What a LLaVA checkout needs for `--vitask`: one small file per upstream version, added lines only."""
