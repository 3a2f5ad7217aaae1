//! LV.1: the race.
