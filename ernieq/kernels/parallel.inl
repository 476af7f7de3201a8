// Threads are started per call: a call takes milliseconds, a thread start tens of microseconds, and no pool
// means nothing to break when the process forks.
#include <atomic>
#include <thread>
#include <vector>

namespace ernieq {

template <class Body>
void parallel_for(long count, int threads, const Body& body) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        for (long index = 0; index < count; ++index) body(index);
        return;
    }
    std::atomic<long> next{0};
    auto work = [&] {
        for (long index = next++; index < count; index = next++) body(index);
    };
    std::vector<std::thread> others;
    for (int i = 1; i < threads; ++i) others.emplace_back(work);
    work();
    for (auto& thread : others) thread.join();
}

}  // namespace ernieq
