//! How a command ends, and its exit code.

use harness::judge::Conclusion;

/// The exit code for an invalid command line, an unreadable file, or a run that could not be carried out.
pub(crate) const USAGE: u8 = 2;
/// The exit code for a backend or a tool that is missing.
pub(crate) const BACKEND_MISSING: u8 = 3;

/// How a command ended. The order is that of severity: of several strategies, the greatest decides.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum ExitKind {
    /// Every guarantee held, and every break that was promised was observed.
    AsPromised,
    /// A promised break was not observed: the run did not stress the strategy enough.
    Inconclusive,
    /// A guarantee was broken.
    Broken,
}

impl ExitKind {
    /// The exit code. Codes are not ordered by severity; the variants are.
    pub(crate) fn code(self) -> u8 {
        match self {
            Self::AsPromised => 0,
            Self::Broken => 1,
            Self::Inconclusive => 4,
        }
    }
}

impl From<&Conclusion> for ExitKind {
    fn from(conclusion: &Conclusion) -> Self {
        match conclusion {
            Conclusion::AsPromised => Self::AsPromised,
            Conclusion::Broken(_) => Self::Broken,
            Conclusion::Inconclusive(_) => Self::Inconclusive,
        }
    }
}
