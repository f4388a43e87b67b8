from typing import Any

def DEFINE_config_dict(
    name: str, config: Any, help_string: str = ..., flag_values: Any = ..., **kwargs: Any
) -> Any: ...
