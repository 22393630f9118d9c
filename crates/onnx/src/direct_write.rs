//! Writes files of gigabytes past the page cache (`O_DIRECT`): the kernel then copies nothing, throttles nothing, and a
//! sync at the end has nothing left to do. Where the file system can't, the same blocks go through the cache.

use crate::stream::Sink;
use std::{
    fs::File,
    io::{self, Write},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
};

/// Shorter files gain nothing.
pub(super) const LARGE_FILE: u64 = 64 << 20;
/// What direct writing wants addresses, places and lengths to be multiples of; more than any disk's sector.
const PAGE: usize = 4096;
const BLOCK: usize = 4 << 20;
/// One is filled, one is written, the others wait.
const BLOCKS: usize = 4;

/// Bytes on their way to the file.
struct Block {
    memory: Vec<u8>,
    filled: usize,
}

impl Block {
    fn new() -> Self {
        Self {
            memory: vec![0; BLOCK + PAGE],
            filled: 0,
        }
    }

    /// The aligned part.
    fn bytes(&mut self) -> &mut [u8] {
        let base = self.memory.as_ptr().align_offset(PAGE).min(PAGE);
        self.memory.get_mut(base..base + BLOCK).unwrap_or_default()
    }

    /// Takes what fits of `bytes`; gives the rest.
    fn take<'b>(&mut self, bytes: &'b [u8]) -> &'b [u8] {
        let from = self.filled;
        let (now, later) = bytes.split_at(bytes.len().min(BLOCK - from));
        if let Some(to) = self.bytes().get_mut(from..from + now.len()) {
            to.copy_from_slice(now);
        }
        self.filled += now.len();
        later
    }
}

/// Fills blocks while a thread writes those before.
struct Blocks {
    block: Block,
    full: SyncSender<Block>,
    free: Receiver<Block>,
}

impl Blocks {
    fn pass_on(&mut self, next: Block) -> io::Result<()> {
        let block = std::mem::replace(&mut self.block, next);
        // The writer ends early with an error of its own only.
        self.full.send(block).map_err(|_| io::ErrorKind::BrokenPipe.into())
    }
}

impl Sink for Blocks {
    fn take(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            bytes = self.block.take(bytes);
            if self.block.filled == BLOCK {
                let next = self.free.recv().map_err(|_| io::ErrorKind::BrokenPipe)?;
                self.pass_on(next)?;
            }
        }
        Ok(())
    }
}

/// Gives `file`, which is new and empty, the `len` bytes that `fill` makes.
///
/// # Errors
/// Those of `fill` and of writing; there is no room for `len` bytes.
pub(super) fn write(file: &File, len: u64, fill: impl FnOnce(&mut dyn Sink) -> io::Result<()>) -> io::Result<()> {
    reserve(file, len)?;
    let direct = set_direct(file, true);
    let (full, to_write) = sync_channel(BLOCKS);
    let (written, free) = sync_channel(BLOCKS);
    for _ in 1..BLOCKS {
        written.send(Block::new()).map_err(io::Error::other)?;
    }
    thread::scope(|scope| {
        let writer = scope.spawn(move || write_blocks(file, &to_write, &written, direct));
        let mut blocks = Blocks {
            block: Block::new(),
            full,
            free,
        };
        let filled = fill(&mut blocks).and_then(|()| blocks.pass_on(Block::new()));
        drop(blocks);
        let written = writer.join();
        written.unwrap_or_else(|_| Err(io::Error::other("the thread that writes has failed")))?;
        filled
    })?;
    set_direct(file, false);
    // The last block was written up to a whole page.
    file.set_len(len)
}

fn write_blocks(
    file: &File,
    to_write: &Receiver<Block>,
    written: &SyncSender<Block>,
    mut direct: bool,
) -> io::Result<()> {
    for mut block in to_write {
        let filled = block.filled;
        let whole = filled.next_multiple_of(PAGE);
        let bytes = block.bytes();
        bytes[filled..whole].fill(0);
        let mut rest = &bytes[..whole];
        while !rest.is_empty() {
            match (&mut &*file).write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => rest = &rest[n..],
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // It said that it could, and can't (or wants more alignment than a page).
                Err(e) if e.kind() == io::ErrorKind::InvalidInput && direct => {
                    set_direct(file, false);
                    direct = false;
                }
                Err(e) => return Err(e),
            }
        }
        block.filled = 0;
        // Nobody waits for the last ones.
        let _ = written.try_send(block);
    }
    Ok(())
}

/// Takes the room at once: writing where a file ends makes it longer each time, and that can't be done beside other
/// writing.
#[cfg(target_os = "linux")]
fn reserve(file: &File, len: u64) -> io::Result<()> {
    use rustix::{
        fs::{FallocateFlags, fallocate},
        io::Errno,
    };
    match fallocate(file, FallocateFlags::empty(), 0, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => Ok(()),
        other => other.map_err(io::Error::from),
    }
}

#[cfg(not(target_os = "linux"))]
fn reserve(_: &File, _: u64) -> io::Result<()> {
    Ok(())
}

/// Whether what is written from now on goes past the cache.
#[cfg(target_os = "linux")]
fn set_direct(file: &File, on: bool) -> bool {
    use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};
    let set = || {
        let mut flags = fcntl_getfl(file)?;
        flags.set(OFlags::DIRECT, on);
        fcntl_setfl(file, flags)
    };
    set().is_ok() && on
}

#[cfg(not(target_os = "linux"))]
fn set_direct(_: &File, _: bool) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn pieces(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 31 + i / 7919) as u8).collect()
    }

    #[test]
    fn bytes_come_out_in_order_whatever_their_number() {
        let folder = tempfile::tempdir().unwrap();
        for len in [1, PAGE, BLOCK - 1, BLOCK, 6 * BLOCK + 12345] {
            let path = folder.path().join(len.to_string());
            let data = pieces(len);
            let file = File::create_new(&path).unwrap();
            let sizes = [1, 4095, 100_000, BLOCK, 3 * BLOCK + 1];
            let fill = |sink: &mut dyn Sink| {
                let mut rest = data.as_slice();
                for size in sizes.iter().cycle() {
                    let (now, later) = rest.split_at(rest.len().min(*size));
                    sink.take(now)?;
                    rest = later;
                    if rest.is_empty() {
                        break;
                    }
                }
                Ok(())
            };
            write(&file, len as u64, fill).unwrap();
            assert!(fs::read(&path).unwrap() == data, "{len}");
        }
    }

    #[test]
    fn errors_of_both_sides_come_out() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("f");
        let file = File::create_new(&path).unwrap();
        let data = pieces(3 * BLOCK);
        let stopped = write(&file, 9 * BLOCK as u64, |sink| {
            sink.take(&data)?;
            Err(io::ErrorKind::InvalidData.into())
        });
        assert_eq!(stopped.unwrap_err().kind(), io::ErrorKind::InvalidData);
        // A file that may not be written.
        let file = File::open(&path).unwrap();
        assert!(write(&file, 9 * BLOCK as u64, |sink| sink.take(&data)).is_err());
    }
}
