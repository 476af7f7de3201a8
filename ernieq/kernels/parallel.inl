// Threads are started per call: a call takes milliseconds, a thread start tens of microseconds, and no pool
// means nothing to break when the process forks.
#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace ernieq {

// What a body throws (memory that is refused) stops the others and is thrown on, once all threads have ended.
template <class Body>
void parallel_for(long count, int threads, const Body& body) {
    if (threads > count) threads = static_cast<int>(count);
    if (threads <= 1) {
        for (long index = 0; index < count; ++index) body(index);
        return;
    }
    std::atomic<long> next{0};
    std::atomic_flag failed = ATOMIC_FLAG_INIT;
    std::exception_ptr failure;
    auto work = [&] {
        try {
            for (long index = next++; index < count; index = next++) body(index);
        } catch (...) {
            next = count;
            if (!failed.test_and_set()) failure = std::current_exception();
        }
    };
    std::vector<std::thread> others;
    others.reserve(threads - 1);
    try {
        for (int i = 1; i < threads; ++i) others.emplace_back(work);
    } catch (const std::system_error&) {  // no more threads are granted: those that are there do it all
    }
    work();
    for (auto& thread : others) thread.join();
    if (failure) std::rethrow_exception(failure);
}

}  // namespace ernieq
