"""What can be wrong with a model on disk, or with a grammar. Each message is one sentence that says what to change.

ModelError (ValueError)
├── ConfigError       config.json / params.json says something we cannot honour
├── CheckpointError   a weight file is missing, truncated, misshaped or not what the config promises
├── TokenizerError    tokenizer files are missing or contradict the config; a chat template failed
├── ConversionError   a checkpoint cannot be written in the other layout, or not there
└── GrammarError      a grammar cannot be honoured, or an answer left its grammar
"""


class ModelError(ValueError):
    pass


class ConfigError(ModelError):
    pass


class CheckpointError(ModelError):
    pass


class TokenizerError(ModelError):
    pass


class ConversionError(ModelError):
    pass


class GrammarError(ModelError):
    pass
