#include "device.h"

#ifdef COMPT_EMULATED
extern "C" int compt_multiprocessors(int) { return 2; }
#else
extern "C" int compt_multiprocessors(int device) {
  int count = 1;
  cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
  return count;
}
#endif
