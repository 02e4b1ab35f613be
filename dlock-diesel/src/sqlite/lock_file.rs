//! The lock file of a database: `NAME-dlock` beside it. The system locks bytes of it, whether they exist or not.
//!
//! It is empty until a fencing token is drawn. Then it holds the last one.

mod byte;
#[cfg(unix)]
mod unix;
#[cfg(not(unix))]
mod unsupported;
#[cfg(unix)]
mod visible;

pub(super) use byte::{Byte, BytePlace};
#[cfg(unix)]
pub(super) use unix::{FileId, LockFile, LockedByte, id_of};
#[cfg(not(unix))]
pub(super) use unsupported::{FileId, LockFile, LockedByte, id_of};
