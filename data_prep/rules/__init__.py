"""Rules about texts: pure functions of a string, without files, configuration or chance."""
