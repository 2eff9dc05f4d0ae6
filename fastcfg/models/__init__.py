"""Networks: GLIDE-compatible text-conditional UNets and their tokenizer."""
