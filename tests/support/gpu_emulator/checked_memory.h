// Memory whose accesses are checked, in place of a language's own. Included after the language's names.
#undef TREADLE_GLOBAL
#undef TREADLE_SHARED
#undef TREADLE_PRIVATE
#undef TREADLE_WIDE
#undef TREADLE_DIVIDE
#undef TREADLE_MODULO
#define TREADLE_GLOBAL(T) emulator::Array<T>
#define TREADLE_SHARED(T, x, n) emulator::Array<T> x = {(T*)emulator::shared(sizeof(T) * (n)), n, #x, true, 0}
#define TREADLE_PRIVATE(T, x, n) emulator::Private<T, n> x(#x)
#define TREADLE_WIDE(T, x, i) (x).wide<T>(i)
#define TREADLE_DIVIDE(x, y) emulator::checked_division(x, y, "division of a negative index")
#define TREADLE_MODULO(x, y) ((x) - emulator::checked_division(x, y, "remainder of a negative index") * (y))
