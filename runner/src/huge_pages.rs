//! Large buffers in huge pages.
//!
//! A decoding step reads rows here and there in caches of many megabytes. With pages of 4 KiB nearly each of them costs
//! a walk through page tables that no processor cache holds; with pages of 2 MiB few do.

/// Asks Linux to keep a buffer in huge pages, where it gives them on request (`madvise` or `always` in
/// `/sys/kernel/mm/transparent_hugepage/enabled`). A hint: what the buffer holds stays, and where there are no huge
/// pages nothing happens.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
pub(crate) fn advise(buffer: &mut [u8]) {
    use std::sync::OnceLock;

    static SIZE: OnceLock<Option<usize>> = OnceLock::new();
    let Some(size) = *SIZE.get_or_init(size_on_request) else {
        return;
    };
    let (start, len) = whole_pages(buffer.as_ptr().addr(), buffer.len(), size);
    let Some(inside) = buffer.get_mut(start..start + len).filter(|inside| !inside.is_empty()) else {
        return;
    };
    // The first makes new pages huge ones, the second those that are there, which zeroing the buffer has made. Linux
    // before 6.1 has no second one, and gets there in time.
    for advice in [libc::MADV_HUGEPAGE, libc::MADV_COLLAPSE] {
        // SAFETY: a range of whole pages within memory that is borrowed exclusively, and neither advice changes what
        // it holds.
        unsafe { libc::madvise(inside.as_mut_ptr().cast(), inside.len(), advice) };
    }
}

/// Other systems have no such hint.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
pub(crate) fn advise(_: &mut [u8]) {}

/// Bytes of a huge page; `None` where there are none on request.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn size_on_request() -> Option<usize> {
    let setting = |name| std::fs::read_to_string(format!("/sys/kernel/mm/transparent_hugepage/{name}")).ok();
    // Collapsing would not ask for it.
    if setting("enabled")?.contains("[never]") {
        return None;
    }
    let size: usize = setting("hpage_pmd_size")?.trim().parse().ok()?;
    size.is_power_of_two().then_some(size)
}

/// Offset and length of the whole pages of `size` bytes in a buffer at `address`.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn whole_pages(address: usize, len: usize, size: usize) -> (usize, usize) {
    let start = address.wrapping_neg() % size;
    (start.min(len), len.saturating_sub(start) / size * size)
}

#[cfg(all(test, target_os = "linux", target_env = "gnu"))]
mod tests {
    use super::*;

    #[test]
    fn pages_are_whole() {
        assert_eq!(whole_pages(0, 4096, 4096), (0, 4096));
        assert_eq!(whole_pages(4096 - 64, 8192, 4096), (64, 4096));
        assert_eq!(whole_pages(4096 + 64, 8192, 4096), (4032, 4096));
        assert_eq!(whole_pages(64, 100, 4096), (100, 0));
        assert_eq!(whole_pages(64, 4096 + 4031, 4096).1, 0);
    }

    #[test]
    fn what_a_buffer_holds_stays() {
        let mut buffer: Vec<u8> = (0..9 << 20)
            .map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8)
            .collect();
        let before = buffer.clone();
        advise(&mut buffer[5..]);
        assert!(buffer == before);
        advise(&mut []);
    }
}
