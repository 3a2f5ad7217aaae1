//! Instrumentation of a server: the trace recorder and the breakpoint, both off by default.

use std::sync::Arc;

use crate::{Steps, breakpoint::Breakpoint, trace::Recorder};

/// Creates the scheduling points of requests and background consumers.
///
/// They are observed only if the settings ask for a trace file or a breakpoint.
#[derive(Clone, Default)]
pub struct Instrumentation {
    pub(crate) recorder: Option<Arc<Recorder>>,
    pub(crate) breakpoint: Option<Arc<Breakpoint>>,
}

impl Instrumentation {
    /// The scheduling points of one request or consumer; `name` identifies it in the trace.
    pub fn steps(&self, name: &str) -> Steps {
        let steps = match &self.recorder {
            None => Steps::unobserved(),
            Some(recorder) => recorder.steps_of(name.into()),
        };
        match &self.breakpoint {
            None => steps,
            Some(breakpoint) => breakpoint.observe(steps),
        }
    }
}
