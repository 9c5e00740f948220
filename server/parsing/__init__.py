"""What a model wrote -> content, reasoning and tool calls, while it is being written.

    text -> ReasoningSplitter -> ToolParser -> pieces
            <think>...</think>   one per notation (formats.py)

Knows text and nothing else: no HTTP, and of tokens only how many. Nothing a model writes is evaluated;
everything is linear in the text, bounded in memory, and the same however the text is cut.
"""
