"""Rules of Apple's compiler that clang's OpenCL mode does not have: found in the text itself."""

import re

_SPACES = re.compile(r"\b(device|threadgroup|constant|thread|ray_data|object_data)\b")
_SCALARS = r"float|half|bfloat|bool|u?char|u?short|u?int|u?long|u?int(?:8|16|32|64)_t|b?float16_t|size_t|void"
_TYPES = rf"(?:{_SCALARS}|(?:float|half|bfloat|u?char|u?short|u?int|u?long)[234]|vec<[^<>]*>|auto|[A-Z]\w*)"
# A type, then * or & and a name or a closing bracket, where a declaration or a cast may begin.
_POINTER = re.compile(
    r"(?:^|[;{}(,<]|\bconst\b|\btypename\b|\bstatic\b)\s*(?:const\s+|volatile\s+)*"
    rf"(?P<type>{_TYPES})\s*(?:const\s*)?(?P<kind>[*&])\s*(?:const\s+|restrict\s+|__restrict\s+)*(?P<name>[A-Za-z_]\w*|\))"
)
_NOT_METAL = re.compile(r"\b(double|goto|new|delete|throw|try|virtual|dynamic_cast|typeid|thread_local)\b")
_LAMBDA = re.compile(r"\[[=&]?\]\s*\(")
_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)


def lint(text: str, name: str, types: list[str]) -> list[str]:
    """Diagnostics of a text called `name`; `types` are the template parameters that are types."""
    code = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    found: list[tuple[int, str]] = []
    for match in _POINTER.finditer(code):
        type = match["type"]
        if type[0].isupper() and type not in types:
            continue  # R * C is a product
        statement = re.split(r"[;{}(,]", code[: match.start("type")])[-1]
        if not _SPACES.search(statement + " " + match[0]):
            what = f"'{type} {match['kind']}{match['name']}'"
            found.append((match.start("type"), f"pointer or reference must have an explicit address space: {what}"))
    found += [(match.start(), f"'{match[0]}' is not in Metal") for match in _NOT_METAL.finditer(code)]
    found += [(match.start(), "a lambda needs Metal 4 (macOS 26)") for match in _LAMBDA.finditer(code)]
    return [f"{name}:{code.count(chr(10), 0, position) + 1}: error: {message}" for position, message in found]
