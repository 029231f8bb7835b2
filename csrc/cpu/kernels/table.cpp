// The kernels of this build.
#include "cpu/kernels.h"

#define HYBRID_LM_TEXT(name) #name
#define HYBRID_LM_NAME(name) HYBRID_LM_TEXT(name)

namespace hybrid_lm {
namespace HYBRID_LM_ISA {

void scan(const ScanArgs&);
void scan_backward(const ScanGradArgs&);
void ssd(const SsdArgs&);
void ssd_backward(const SsdGradArgs&);
void conv(const ConvArgs&);
void conv_backward(const ConvGradArgs&);
void norm(const NormArgs&);
void norm_backward(const NormGradArgs&);
void linear(const LinearArgs&);

extern const Kernels kernels;
const Kernels kernels = {HYBRID_LM_NAME(HYBRID_LM_ISA), scan, scan_backward, ssd,   ssd_backward,
                         conv, conv_backward, norm, norm_backward, linear};

}  // namespace HYBRID_LM_ISA
}  // namespace hybrid_lm
