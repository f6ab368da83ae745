// What a device must answer truthfully for MindSpore to go on: its name, its number, its memory, and places for
// what is "created" on it. Device memory is address space that is never touched.
#include <stddef.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

const char *aclrtGetSocName(void) {
  const char *name = getenv("DRY_RUN_SOC");
  return name ? name : "Ascend910B2";
}

int aclrtGetDeviceCount(unsigned *count) {
  *count = 8;
  return 0;
}

int aclrtGetDevice(int *device) {
  *device = 0;
  return 0;
}

int aclrtGetMemInfo(int kind, size_t *unused, size_t *total) {
  *total = (size_t)64 << 30;
  *unused = (size_t)62 << 30;
  return 0;
}

int aclrtMalloc(void **place, size_t bytes, int policy) {
  *place = mmap(NULL, bytes ? bytes : 1, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  return *place == MAP_FAILED;
}

int aclrtMallocAlign32(void **place, size_t bytes, int policy) { return aclrtMalloc(place, bytes, policy); }

int aclrtMallocHost(void **place, size_t bytes) {
  *place = malloc(bytes ? bytes : 1);
  return *place == NULL;
}

int aclrtFreeHost(void *place) {
  free(place);
  return 0;
}

static int created(void **place) {
  *place = malloc(64);
  return 0;
}

int aclrtCreateContext(void **context, int device) { return created(context); }
int aclrtGetCurrentContext(void **context) { return created(context); }
int aclrtCreateStream(void **stream) { return created(stream); }
int aclrtCreateStreamWithConfig(void **stream, unsigned priority, unsigned flag) { return created(stream); }
int aclrtCreateEvent(void **event) { return created(event); }
int aclrtCreateEventWithFlag(void **event, unsigned flag) { return created(event); }
int aclrtCreateEventExWithFlag(void **event, unsigned flag) { return created(event); }

// nothing ever arrives
int acltdtReceiveTensor(void *handle, void *dataset, int timeout) {
  for (;;) pause();
}
