// Includes the header PANGU_BODY once for each instruction set; see isa.h.
#define PANGU_LEVEL 0
namespace portable {
#include PANGU_BODY
}
#undef PANGU_LEVEL
#if PANGU_X86
#define PANGU_LEVEL 1
PANGU_BEGIN_AVX2
namespace avx2 {
#include PANGU_BODY
}
PANGU_END
#undef PANGU_LEVEL
#define PANGU_LEVEL 2
PANGU_BEGIN_VNNI
namespace vnni {
#include PANGU_BODY
}
PANGU_END
#undef PANGU_LEVEL
#endif
#undef PANGU_BODY
