//! What systems do in ways of their own. On Linux and macOS a file is known by its inode and may be locked, links need
//! not be followed, and permissions are the umask's. Elsewhere files are as readable as their folder makes them, and
//! are known by their names.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

/// Leaves it to the user's umask who may read a temporary file or folder, which only its owner may otherwise.
pub fn leave_to_umask(builder: &mut tempfile::Builder<'_, '_>, mode: u32) {
    #[cfg(unix)]
    {
        use std::os::unix::fs::PermissionsExt;
        builder.permissions(fs::Permissions::from_mode(mode));
    }
    #[cfg(not(unix))]
    let _ = (builder, mode);
}

/// Whether an open file or folder is still the one of that name.
pub(crate) fn is_at(file: &File, path: &Path) -> bool {
    match (file.metadata(), fs::symlink_metadata(path)) {
        (Ok(open), Ok(there)) => is_one(&open, &there),
        _ => false,
    }
}

#[cfg(unix)]
fn is_one(a: &fs::Metadata, b: &fs::Metadata) -> bool {
    use std::os::unix::fs::MetadataExt;
    (a.dev(), a.ino()) == (b.dev(), b.ino())
}

/// Temporary names are random: what has one is what was given it.
#[cfg(not(unix))]
fn is_one(a: &fs::Metadata, b: &fs::Metadata) -> bool {
    a.file_type() == b.file_type()
}

/// Opens a file or folder to lock it: without following a link, and without waiting for a pipe's other end.
pub(crate) fn open_to_lock(path: &Path) -> io::Result<File> {
    let mut options = fs::OpenOptions::new();
    options.read(true);
    #[cfg(unix)]
    {
        use rustix::fs::OFlags;
        use std::os::unix::fs::OpenOptionsExt;
        options.custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits() as i32);
    }
    #[cfg(windows)]
    {
        use std::os::windows::fs::OpenOptionsExt;
        // FILE_FLAG_BACKUP_SEMANTICS, without which no folder opens, and FILE_FLAG_OPEN_REPARSE_POINT.
        options.custom_flags(0x0200_0000 | 0x0020_0000);
    }
    options.open(path)
}

/// Writes all bytes at a place of a file, beside what other threads write.
///
/// # Errors
/// The file cannot be written.
pub fn write_all_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(unix)]
    {
        std::os::unix::fs::FileExt::write_all_at(file, bytes, offset)
    }
    #[cfg(windows)]
    {
        let (mut rest, mut at) = (bytes, offset);
        while !rest.is_empty() {
            match std::os::windows::fs::FileExt::seek_write(file, rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => (rest, at) = (&rest[n..], at + n as u64),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e),
            }
        }
        Ok(())
    }
}
