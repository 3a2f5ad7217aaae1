//! The commands, one module each. Each has a function `run`.

pub(crate) mod bench;
#[cfg(feature = "lv4")]
pub(crate) mod dead_letters;
pub(crate) mod doctor;
pub(crate) mod exercise;
pub(crate) mod judge;
pub(crate) mod list;
pub(crate) mod red;
pub(crate) mod rush;
pub(crate) mod serve;
pub(crate) mod size;
pub(crate) mod source;
pub(crate) mod stand;
pub(crate) mod tool;
pub(crate) mod trace;
