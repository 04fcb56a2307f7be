"""Knee phantoms in the released dataset's layout: crude anatomy, lesions that really follow their grades."""
